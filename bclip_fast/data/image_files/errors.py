"""The error of an image that cannot be decoded."""


class ImageError(ValueError):
    """The image is refused. The message is the reason, in one line."""

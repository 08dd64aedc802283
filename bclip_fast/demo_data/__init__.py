"""The images and captions of `bclip quickstart`, made from the sample data of public packages."""

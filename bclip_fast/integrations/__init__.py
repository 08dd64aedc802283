"""The losses inside other people's code: the smallest possible patches, imported where they are used."""

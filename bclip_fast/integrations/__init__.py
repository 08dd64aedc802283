"""Our losses in other libraries: the smallest possible patches, which import those libraries only when called."""

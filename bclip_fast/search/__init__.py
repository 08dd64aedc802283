"""An index of images, its queries, and a web page to search it."""

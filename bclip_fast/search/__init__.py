"""An index of images, its queries, and a page to search it."""

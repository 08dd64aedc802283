"""HTML pages for reports: templates, charts and thumbnails. A page needs neither network nor scripts."""

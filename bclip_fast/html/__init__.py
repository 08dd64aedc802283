"""Pages of HTML for reports: templates, charts, thumbnails. A page needs no network and no script."""

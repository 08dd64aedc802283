"""From PubMed Central's articles to shards of figure-caption pairs."""

"""Where files lie and how they are read and written whole: home folders, buckets, locks, ids by content."""

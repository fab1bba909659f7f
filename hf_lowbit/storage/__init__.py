"""Files: what lies on disk, checked before it is trusted."""

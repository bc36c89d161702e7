"""Questions to the catalog; nothing here writes."""

"""The names that torch keeps private, or that some supported release of it lacks."""

"""Whatever is JSON at rest: manifests, journal entries, marks; one definition each."""

"""Running models: sessions, recordings, the machine that they run on."""

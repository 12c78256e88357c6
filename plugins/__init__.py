"""First-party plugins: one file per published method, written only against the public API."""

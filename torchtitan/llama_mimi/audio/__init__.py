"""Audio: read recordings as mono samples, and encode and decode them with Mimi."""

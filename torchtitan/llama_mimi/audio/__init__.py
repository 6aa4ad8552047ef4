"""Audio: read recordings as mono samples; encode and decode audio with Mimi."""

"""The engine alone: no Ray, no HTTP, beside what else a user could run on the same machine."""

"""A load on an OpenAI-compatible endpoint, measured where its clients stand."""

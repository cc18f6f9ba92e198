"""The HTTP server: native (TGI) and OpenAI routes over one engine."""

"""The OpenAI protocol over HTTP. The engine schedules; nothing here does."""

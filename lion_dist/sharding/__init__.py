"""Bytes: who owns what, and how it travels. Nothing here knows a learning rate or a sign rule."""

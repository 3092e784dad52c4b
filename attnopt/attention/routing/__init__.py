"""Routing attention: nearby tokens, and earlier ones of the same cluster."""

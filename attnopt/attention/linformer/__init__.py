"""Linformer: attention in both directions over a learned projection of the text's length."""

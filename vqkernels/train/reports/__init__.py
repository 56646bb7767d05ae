"""Measurements as text, pictures and pages."""

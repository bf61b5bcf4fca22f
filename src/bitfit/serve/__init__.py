"""Serving: many tasks over one base, added, replaced and removed while they answer."""

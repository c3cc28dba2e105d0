"""Models made of several models that are trained as one and used apart: what some objectives train."""

"""Trees and runs to look at: pictures and text."""

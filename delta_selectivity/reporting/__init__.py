"""Text tables, CSV, and one HTML page with plots."""

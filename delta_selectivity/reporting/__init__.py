"""Results for people: text tables, a CSV, and one HTML page with its plots; each idea in a file of its own."""

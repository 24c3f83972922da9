"""Reports for people: progress, tables, figures and pages."""

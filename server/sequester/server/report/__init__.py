"""What people read: results.json, report.html, the scoring file."""

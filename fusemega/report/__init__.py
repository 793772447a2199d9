"""Pictures and pages of what runs found."""

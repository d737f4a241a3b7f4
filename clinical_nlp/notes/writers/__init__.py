"""Writers: one file a format. They take plain rows and give bytes that depend on nothing but those rows."""

"""What the files of the sources hold: text, records, packed files, and what to fetch."""

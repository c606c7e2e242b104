"""How well text was read: by characters, edits, whole texts and counts."""

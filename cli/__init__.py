"""How every command reads its arguments, and how it ends."""

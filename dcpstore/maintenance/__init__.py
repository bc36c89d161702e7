"""What may go, what is damaged, and how a lost catalog comes back."""

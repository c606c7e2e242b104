"""How well questions about images were answered: against one answer, or those of many people."""

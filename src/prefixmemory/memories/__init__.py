"""What is read: the choices of a memory, its parameters, and what guards a saved one."""

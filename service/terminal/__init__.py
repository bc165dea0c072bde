"""What people see and type: clients of a running server, and how every command prints."""

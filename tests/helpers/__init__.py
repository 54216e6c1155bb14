"""What tests share: small models, worlds of servers and repositories, processes that are killed."""

"""From files of preferences to token ids: row families, chat templates, checks and the token store."""

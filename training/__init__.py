"""How the shipped model, epilimnion, is made: data, network, training, evaluation, export."""

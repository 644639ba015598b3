"""Reading, hashing and downloading Flickr8k (Hodosh, Young and Hockenmaier, 2013, doi:10.1613/jair.3994)."""

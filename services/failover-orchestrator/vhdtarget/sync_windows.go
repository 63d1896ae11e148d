package vhdtarget

// syncFolder does nothing: NTFS journals names, and a folder cannot be flushed without special rights.
func syncFolder(string) error { return nil }

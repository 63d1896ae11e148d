//go:build !unix

package pki

// syncDir has nothing to do: Windows has no sync of folders, and NTFS journals names.
func syncDir(string) error { return nil }

// checkPrivate has nothing to do: access is by the folder's ACL, inherited from the state directory.
func checkPrivate(string) error { return nil }

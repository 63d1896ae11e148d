package blobstoretest

import (
	"context"
	"errors"
	"slices"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// Restrict is inner as an identity sees it that has these grants only: everything else is blobstore.ErrPermission.
func Restrict(inner blobstore.Store, grants blobstore.Grants) *Faulty {
	return NewFaulty(inner, func(op Op, container, name string) Fault {
		switch {
		case op == OpNow: // any answer carries it
			return None
		case op == OpListContainers: // asked of the account, not of a container
			if slices.ContainsFunc(grants, func(g blobstore.Grant) bool { return g.Actions&blobstore.ListContainers != 0 }) {
				return None
			}
		case grants.Allow(needed(inner, op, container, name), container, name):
			return None
		}
		return Denied
	})
}

// needed is the set of actions of which one allows the call.
func needed(inner blobstore.Store, op Op, container, name string) blobstore.Action {
	switch op {
	case OpCreateContainer:
		return blobstore.MakeContainers
	case OpGet, OpStat, OpList, OpReadPages, OpPageRanges, OpListSnapshots:
		return blobstore.Read
	case OpDelete, OpDeleteSnapshot:
		return blobstore.Delete
	case OpPut, OpCreatePages:
		// Create reaches names that are not taken, whatever the call's own conditions say.
		if _, err := inner.Container(container).Stat(context.Background(), name, ""); errors.Is(err, blobstore.ErrNotFound) {
			return blobstore.Create | blobstore.Write
		}
		return blobstore.Write
	default:
		return blobstore.Write
	}
}

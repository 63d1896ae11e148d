package blobstoretest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/landfall-dr/landfall/libs/blobstore"
)

// Restrict is inner as an identity sees it that has these grants only: everything else is blobstore.ErrPermission. Who may create and
// not write gets ErrExists for a create-only put under a taken name, as from any backend.
func Restrict(inner blobstore.Store, grants blobstore.Grants) blobstore.Store {
	return restricted{grants, NewFaulty(inner, func(op Op, container, name string) Fault {
		switch {
		case op == OpNow: // any answer carries it
			return None
		case op == OpListContainers: // asked of the account, not of a container
			if slices.ContainsFunc(grants, func(g blobstore.Grant) bool { return g.Actions&blobstore.ListContainers != 0 }) {
				return None
			}
		case grants.Allow(needed(op), container, name):
			return None
		}
		return Denied
	})}
}

// needed is the set of actions of which one allows the call.
func needed(op Op) blobstore.Action {
	switch op {
	case OpCreateContainer:
		return blobstore.MakeContainers
	case OpGet, OpStat, OpList, OpReadPages, OpPageRanges, OpListSnapshots:
		return blobstore.Read
	case OpDelete, OpDeleteSnapshot:
		return blobstore.Delete
	case OpPut, OpCreatePages:
		return blobstore.Create | blobstore.Write
	default:
		return blobstore.Write
	}
}

type restricted struct {
	grants blobstore.Grants
	*Faulty
}

// Container returns a handle that holds to the grants.
func (r restricted) Container(name string) blobstore.Container {
	return restrictedContainer{r, r.Faulty.Container(name)}
}

type restrictedContainer struct {
	r restricted
	blobstore.Container
}

// Put refuses to overwrite for who may only create.
func (c restrictedContainer) Put(ctx context.Context, name string, body io.ReadSeeker, size int64, cond blobstore.Conditions) (blobstore.Properties, error) {
	if !cond.CreateOnly && !c.r.grants.Allow(blobstore.Write, c.Name(), name) {
		if _, err := c.r.inner.Container(c.Name()).Stat(ctx, name, ""); !errors.Is(err, blobstore.ErrNotFound) {
			return blobstore.Properties{}, fmt.Errorf("Put %s/%s: %w", c.Name(), name, blobstore.ErrPermission)
		}
	}
	return c.Container.Put(ctx, name, body, size, cond)
}

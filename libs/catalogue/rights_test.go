package catalogue

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/replica"
)

// The roles that write the catalogue can do so with their own rights, and only they.
func TestOwnRightsAreEnough(t *testing.T) {
	store := blobstoretest.NewMemory()
	as := func(role replica.Role) *Catalogue { return Open(blobstoretest.Restrict(store, replica.Rights(role))) }
	once := func(role replica.Role, prefixes []string, records ...*Record) error {
		m := NewMirror(MirrorOptions{Catalogue: as(role), Source: newSource(records...), Prefixes: prefixes})
		_, err := m.round(t.Context())
		return err
	}
	require.NoError(t, once(replica.RoleSchedule, []string{"sites/", "policies/"}, vmRecord("web"), policyRecord(30)), "it makes the container")
	require.NoError(t, once(replica.RoleFailover, []string{"plans/"}, planRecord()))
	require.NoError(t, once(replica.RoleSchedule, []string{"sites/", "policies/"}, vmRecord("web-01"), policyRecord(60)))
	for _, role := range []replica.Role{replica.RoleRecover, replica.RoleTakeOver} {
		l, err := as(role).List(t.Context(), "")
		require.NoError(t, err)
		require.Len(t, l.Records, 3)
		_, err = as(role).Put(t.Context(), &Record{Policy: policyRecord(1).Policy, Written: at}, VersionOf{})
		require.ErrorIs(t, err, blobstore.ErrPermission, "%s only reads", role)
	}
	require.ErrorIs(t, once(replica.RoleFailover, []string{"plans/"}, policyRecord(30)), blobstore.ErrPermission, "policies are the scheduler's")
	for _, role := range []replica.Role{replica.RoleShip, replica.RoleApply, replica.RoleRetain} {
		_, err := as(role).List(t.Context(), "")
		require.ErrorIs(t, err, blobstore.ErrPermission, "%s has no business here", role)
	}
}

package storagecheck

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/backend"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
	"github.com/landfall-dr/landfall/libs/blobstore/dir"
	"github.com/landfall-dr/landfall/libs/config"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/testkit/azurite"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func options(role replica.Role) Options {
	return Options{Role: role, Bytes: 8 << 20, Clock: time.Now}
}

// prepared is a store that role schedule has tried.
func prepared(t *testing.T) *blobstoretest.Memory {
	store := blobstoretest.NewMemoryClock(time.Now)
	_, err := Run(t.Context(), store, options(replica.RoleSchedule))
	require.NoError(t, err)
	return store
}

func only(r *Report, result Result) (found []Check) {
	for _, c := range r.Checks {
		if c.Result == result {
			found = append(found, c)
		}
	}
	return found
}

// TestEachRoleWithItsOwnRights: nothing fails and nothing is too much.
func TestEachRoleWithItsOwnRights(t *testing.T) {
	store := prepared(t)
	for _, role := range replica.Roles() {
		t.Run(string(role), func(t *testing.T) {
			r, err := Run(t.Context(), blobstoretest.Restrict(store, replica.Rights(role)), options(role))
			require.NoError(t, err)
			require.Empty(t, only(r, Fail))
			require.Empty(t, only(r, Warn))
			if role == replica.RoleApply {
				require.Positive(t, r.PageBytesPerSecond)
			}
		})
	}
}

// TestEachMissingRightIsNamed takes grants away one by one.
func TestEachMissingRightIsNamed(t *testing.T) {
	for _, role := range replica.Roles() {
		grants := replica.Rights(role)
		for i := range grants {
			if grants[i].Actions&^(blobstore.ListContainers|blobstore.MakeContainers) == 0 || grants[i].Blobs == "idx/" {
				continue
			}
			less := append(append(blobstore.Grants{}, grants[:i]...), grants[i+1:]...)
			r, err := Run(t.Context(), blobstoretest.Restrict(prepared(t), less), options(role))
			if err != nil {
				require.ErrorIs(t, err, blobstore.ErrPermission, "%s without %+v", role, grants[i])
				continue
			}
			require.True(t, r.Failed(), "%s without %+v", role, grants[i])
			require.NotEmpty(t, only(r, Fail)[0].Change)
		}
	}
}

func TestTooManyRightsAreNamed(t *testing.T) {
	r, err := Run(t.Context(), prepared(t), options(replica.RoleShip))
	require.NoError(t, err)
	require.False(t, r.Failed())
	require.NotEmpty(t, only(r, Warn))
	require.Contains(t, only(r, Warn)[0].Change, "an identity of its own")
	require.Empty(t, r.Left)
}

func TestContainersComeFirst(t *testing.T) {
	store := blobstoretest.Restrict(blobstoretest.NewMemory(), replica.Rights(replica.RoleShip))
	_, err := Run(t.Context(), store, options(replica.RoleShip))
	require.ErrorIs(t, err, blobstore.ErrNoContainer)
	require.ErrorContains(t, err, "as role schedule first")
}

func TestClocksAndPolicies(t *testing.T) {
	o := options(replica.RoleSchedule)
	o.Clock = func() time.Time { return time.Now().Add(time.Hour) }
	o.WriteOnce = 24 * time.Hour
	r, err := Run(t.Context(), blobstoretest.NewMemoryClock(time.Now), o)
	require.NoError(t, err)
	failed := only(r, Fail)
	require.Len(t, failed, 2)
	require.Equal(t, "clock", failed[0].Name)
	require.Contains(t, failed[0].Found, "1h0m0s")
	require.Equal(t, "write-once journal", failed[1].Name)
	_, err = Run(t.Context(), blobstoretest.NewMemory(), options("nobody"))
	require.ErrorIs(t, err, blobstore.ErrInvalid)
}

func TestAFolder(t *testing.T) {
	store, err := dir.Open(t.TempDir(), dir.Options{})
	require.NoError(t, err)
	defer store.Close()
	for _, role := range []replica.Role{replica.RoleSchedule, replica.RoleApply, replica.RoleShip, replica.RoleRetain} {
		r, err := Run(t.Context(), store, options(role))
		require.NoError(t, err)
		require.False(t, r.Failed(), "%+v", only(r, Fail))
	}
}

// TestAzurite: the real emulator keeps what it promises, as far as it promises.
func TestAzurite(t *testing.T) {
	s := backend.DefaultSettings()
	s.Azure.ConnectionString = config.NewSecret(azurite.Start(t).ConnectionString())
	store, err := backend.Open(t.Context(), s, backend.Options{})
	require.NoError(t, err)
	defer store.Close()
	for _, role := range []replica.Role{replica.RoleSchedule, replica.RoleShip, replica.RoleApply} {
		r, err := Run(t.Context(), store, options(role))
		require.NoError(t, err)
		require.Empty(t, only(r, Fail))
	}
}

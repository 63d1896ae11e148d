package azurefake

import (
	"net/http"
	"time"
)

// Options of a server. The zero value is a strict service with a random account over plain http.
type Options struct {
	// Account and Key (base64) of the storage account; empty are made up.
	Account, Key string
	// TLS serves https with a self-signed certificate ([Server.CertificatePEM]). Token credentials need it.
	TLS bool
	// Now is storage time; nil is time.Now. It decides leases, write-once expiry, SAS times and what the clients' dates are
	// compared with. Rate limits and delays always run by the machine's clock.
	Now func() time.Time

	// MaxSkew is how far a request's date may be off storage time; 0 is the service's 15 minutes, below 0 is any (for tests that
	// move storage time and not the client's).
	MaxSkew time.Duration

	// Principals are the bearer tokens that are accepted, and what each may do. See also [Server.SetGrants].
	Principals map[string]Grants
	// NoSharedKey refuses shared keys and SAS signed with them, as allowSharedKeyAccess=false does (403
	// KeyBasedAuthenticationNotPermitted).
	NoSharedKey bool

	// Intercept is asked once per request, after it was authorised. Nil, or the zero Fault, changes nothing.
	Intercept func(*http.Request) Fault
	// Latency is added to each request.
	Latency time.Duration
	// Bandwidth, bytes/s, is shared by all bodies of the server, BlobBandwidth by those of each blob: both slow down and
	// never refuse. 0 is unlimited.
	Bandwidth, BlobBandwidth float64

	// PageBlobRequests (per s) and PageBlobBytes (per s) are what one page blob takes before it answers 503 ServerBusy.
	// 0 is the service's target (500 and 60 MiB), below 0 is no limit.
	PageBlobRequests, PageBlobBytes float64
	// AccountRequests (per s) refuses alike for the whole account; 0 or below is no limit.
	AccountRequests float64
	// LimitBurst is how long a blob that was idle takes more than its limits; 0 is a quarter of a second.
	LimitBurst time.Duration
	// RetryAfter, rounded up to seconds, is sent with each 503 if it is above 0.
	RetryAfter time.Duration

	// Capacity of the account in bytes, for data as kept (64 KiB of page blob at a time); 0 is 8 GiB, with Discard unlimited.
	Capacity int64
	// FullStatus and FullCode are the answer of a full account; empty is 409 AccountCapacityExceeded.
	FullStatus int
	FullCode   string

	// Discard keeps no bytes of bodies, only their sizes and ranges: reads give zeros.
	Discard bool
	// Digest makes [Server.Blob] answer a digest of what was written, also with Discard.
	Digest bool

	// SoftDeleteDays is reported by Get Blob Service Properties; 0 is off.
	SoftDeleteDays int
	// Versioning adds x-ms-version-id to the answers that make or describe a version: Get Blob Service Properties does not say
	// whether versioning is on, in the service neither.
	Versioning bool
	// ImmutableFirst answers BlobImmutableDueToPolicy also to a create-only Put Blob on an existing blob; else that is
	// BlobAlreadyExists. Which one the service gives is not documented.
	ImmutableFirst bool
}

// Fault is what happens to one request. The fields combine; Status or ResetBefore keep the request from having an effect.
type Fault struct {
	// Delay passes before anything else.
	Delay time.Duration
	// Status and Code refuse the request, for example 503 and "ServerBusy".
	Status int
	Code   string
	// RetryAfter, rounded up to seconds, goes with Status.
	RetryAfter time.Duration
	// ResetBefore ends the connection without an effect, ResetAfter after the effect and without an answer (a lost answer).
	ResetBefore, ResetAfter bool
	// DelayAfter passes between the effect and the answer.
	DelayAfter time.Duration
	// FlipBit changes one bit in the middle of the answer's body.
	FlipBit bool
}

// Busy is a 503 ServerBusy; retryAfter may be 0.
func Busy(retryAfter time.Duration) Fault {
	return Fault{Status: http.StatusServiceUnavailable, Code: "ServerBusy", RetryAfter: retryAfter}
}

// Action is a set of data actions, as of Azure's roles.
type Action uint16

// The actions. Their names in roles are below Microsoft.Storage/storageAccounts/blobServices/.
const (
	Read            Action = 1 << iota // containers/blobs/read, without listing
	List                               // containers/blobs/read for List Blobs: kept apart so that it can be denied
	Create                             // containers/blobs/add/action: new blobs, snapshots
	Write                              // containers/blobs/write: overwrite, pages, leases, metadata, and all that Create is
	Delete                             // containers/blobs/delete
	ContainerRead                      // containers/read: list, properties
	ContainerWrite                     // containers/write: create, lease, metadata
	ContainerDelete                    // containers/delete
	ServiceRead                        // read: service properties, account information
	DelegationKey                      // generateUserDelegationKey/action
)

// AllActions is every action.
const AllActions = Read | List | Create | Write | Delete | ContainerRead | ContainerWrite | ContainerDelete | ServiceRead | DelegationKey

// Grant allows actions on the containers and blobs whose names begin with the prefixes; it stands for a role assignment with
// a condition on the container's and the blob's name. A listing is allowed when its own prefix begins with Blob.
type Grant struct {
	Container, Blob string
	Actions         Action
}

// Grants are all that one principal may do.
type Grants []Grant

func (g Grants) allow(any Action, container, blob string) bool {
	for _, r := range g {
		if r.Actions&any != 0 && hasPrefix(container, r.Container) && hasPrefix(blob, r.Blob) {
			return true
		}
	}
	return false
}

func hasPrefix(s, prefix string) bool { return len(s) >= len(prefix) && s[:len(prefix)] == prefix }

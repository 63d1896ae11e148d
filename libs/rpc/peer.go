package rpc

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/landfall-dr/landfall/libs/rpc/pki"
)

// Peer is who calls: Name, Kind (service or user), Role of a user, Host of a service that is bound to
// one, and Aliases of a process that runs several services.
type Peer = pki.Identity

// Identity is what a program shows of itself.
type Identity struct {
	// Peer is whom in-memory connections of this program speak for.
	Peer Peer
	// Files is the certificate for TCP; nil where only in-memory connections are made.
	Files *pki.Files
}

// LoadIdentity reads the certificate folder of a program; Peer is the certificate's identity. Now is
// the clock that certificates are checked by.
func LoadIdentity(dir string, now func() time.Time) (Identity, error) {
	files, err := pki.Load(dir, now)
	if err != nil {
		return Identity{}, fmt.Errorf("load the identity: %w", err)
	}
	return Identity{Peer: files.Identity(), Files: files}, nil
}

type peerKey struct{}

// ContextWithPeer returns a context in which PeerFrom finds p: for tests that call handlers directly.
func ContextWithPeer(ctx context.Context, p Peer) context.Context {
	return context.WithValue(ctx, peerKey{}, p)
}

// PeerFrom returns the caller of the gRPC call that ctx belongs to. In a handler of a [Server] it is
// always there.
func PeerFrom(ctx context.Context) (Peer, bool) {
	if p, ok := ctx.Value(peerKey{}).(Peer); ok {
		return p, true
	}
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(authInfo); ok && !info.peer.IsZero() {
			return info.peer, true
		}
	}
	return Peer{}, false
}

// authInfo is what a handshake found out about the other side.
type authInfo struct {
	credentials.CommonAuthInfo
	kind string
	peer Peer
}

// AuthType implements credentials.AuthInfo.
func (a authInfo) AuthType() string { return a.kind }

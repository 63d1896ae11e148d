package pki

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
)

// Kind tells services from people.
type Kind string

// The kinds of identity.
const (
	// Service is one of Landfall's programs.
	Service Kind = "service"
	// User is a person or an automation account; it has a role.
	User Kind = "user"
)

// Role ranks what a user may do; each includes the ones before it. The numbers are those of
// landfall.types.v1.Role.
type Role int

// The roles of users. Services have RoleNone.
const (
	RoleNone Role = iota
	RoleViewer
	RoleOperator
	RoleAdmin
)

var roleNames = []string{"none", "viewer", "operator", "admin"}

// String is the role's name as it stands in certificates and commands.
func (r Role) String() string {
	if r < 0 || int(r) >= len(roleNames) {
		return fmt.Sprintf("role(%d)", int(r))
	}
	return roleNames[r]
}

// ParseRole is the inverse of String, for the roles that a user may have.
func ParseRole(s string) (Role, error) {
	if i := slices.Index(roleNames, s); i > 0 {
		return Role(i), nil
	}
	return RoleNone, fmt.Errorf("role %q is not one of viewer, operator, admin", s)
}

// Identity is who a certificate, or an in-memory connection, speaks for.
type Identity struct {
	// Kind is Service or User.
	Kind Kind
	// Name is the service's program name ("change-tracker") or the user's name. Lower-case letters,
	// digits, '-', '.', '_'; for users also '@'.
	Name string
	// Aliases are further services that the same process runs under one certificate, as host-provider
	// and change-tracker on a host do.
	Aliases []string
	// Role of a user; RoleNone for services.
	Role Role
	// Host is the host a service runs on, if it is bound to one; empty otherwise.
	Host string
}

const scheme = "landfall"

// ServiceIdentity is a service with its aliases, not bound to a host.
func ServiceIdentity(name string, aliases ...string) Identity {
	return Identity{Kind: Service, Name: name, Aliases: aliases}
}

// UserIdentity is a user with a role.
func UserIdentity(name string, role Role) Identity {
	return Identity{Kind: User, Name: name, Role: role}
}

// On returns the identity bound to a host.
func (id Identity) On(host string) Identity {
	id.Host = host
	return id
}

// IsZero reports whether nobody is named.
func (id Identity) IsZero() bool { return id.Kind == "" && id.Name == "" }

// IsService reports whether the identity is the named service, by its name or an alias.
func (id Identity) IsService(name string) bool {
	return id.Kind == Service && (id.Name == name || slices.Contains(id.Aliases, name))
}

// Equal compares all parts.
func (id Identity) Equal(o Identity) bool {
	return id.Kind == o.Kind && id.Name == o.Name && id.Role == o.Role && id.Host == o.Host &&
		slices.Equal(id.Aliases, o.Aliases)
}

// String is for logs: "service change-tracker on host-1", "user ann (operator)".
func (id Identity) String() string {
	switch {
	case id.IsZero():
		return "nobody"
	case id.Kind == User:
		return fmt.Sprintf("user %s (%s)", id.Name, id.Role)
	case id.Host != "":
		return fmt.Sprintf("service %s on %s", id.Name, id.Host)
	default:
		return "service " + id.Name
	}
}

// Validate reports what makes the identity impossible.
func (id Identity) Validate() error {
	switch id.Kind {
	case Service:
		if id.Role != RoleNone {
			return fmt.Errorf("service %s has the role %s; only users have roles", id.Name, id.Role)
		}
	case User:
		if id.Role < RoleViewer || id.Role > RoleAdmin {
			return fmt.Errorf("user %s has no role", id.Name)
		}
		if id.Host != "" || len(id.Aliases) > 0 {
			return fmt.Errorf("user %s has a host or aliases; only services do", id.Name)
		}
	default:
		return fmt.Errorf("kind %q is neither service nor user", id.Kind)
	}
	for _, n := range append([]string{id.Name}, id.Aliases...) {
		if !validName(n, id.Kind == User) {
			return fmt.Errorf("%q is not a valid %s name", n, id.Kind)
		}
	}
	if id.Host != "" && !validName(id.Host, false) {
		return fmt.Errorf("%q is not a valid host name", id.Host)
	}
	return nil
}

// URIs are the identity's names in a certificate, the main one first.
func (id Identity) URIs() []*url.URL {
	if id.Kind == User {
		return []*url.URL{{Scheme: scheme, Host: string(User), Path: "/" + id.Name, RawQuery: "role=" + id.Role.String()}}
	}
	uris := make([]*url.URL, 0, 1+len(id.Aliases))
	for _, n := range append([]string{id.Name}, id.Aliases...) {
		path := "/" + n
		if id.Host != "" {
			path += "/" + id.Host
		}
		uris = append(uris, &url.URL{Scheme: scheme, Host: string(Service), Path: path})
	}
	return uris
}

// ErrNoIdentity is returned for certificates that name no Landfall service or user.
var ErrNoIdentity = errors.New("the certificate names no landfall service or user")

// FromCertificate reads the identity of a certificate. It does not verify the certificate.
func FromCertificate(cert *x509.Certificate) (Identity, error) {
	var id Identity
	for _, u := range cert.URIs {
		if u.Scheme != scheme {
			continue
		}
		one, err := parse(u)
		if err != nil {
			return Identity{}, fmt.Errorf("certificate identity %s: %w", u, err)
		}
		switch {
		case id.IsZero():
			id = one
		case id.Kind == Service && one.Kind == Service && one.Host == id.Host:
			id.Aliases = append(id.Aliases, one.Name)
		default:
			return Identity{}, fmt.Errorf("certificate names both %s and %s", id, one)
		}
	}
	if id.IsZero() {
		return Identity{}, ErrNoIdentity
	}
	return id, nil
}

func parse(u *url.URL) (Identity, error) {
	parts := strings.Split(strings.TrimPrefix(u.Path, "/"), "/")
	id := Identity{Kind: Kind(u.Host), Name: parts[0]}
	switch {
	case id.Kind == Service && len(parts) == 2:
		id.Host = parts[1]
	case len(parts) != 1:
		return Identity{}, errors.New("path has the wrong number of parts")
	}
	if id.Kind == User {
		role, err := ParseRole(u.Query().Get("role"))
		if err != nil {
			return Identity{}, err
		}
		id.Role = role
	}
	return id, id.Validate()
}

// validName keeps names that need no escaping in a URI, a path or a NATS subject token. Host names
// arrive from hypervisors in any case, so letters of both cases are taken.
func validName(s string, user bool) bool {
	if s == "" || len(s) > 128 || s[0] == '.' || s[0] == '-' {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '.', c == '_':
		case user && c == '@':
		default:
			return false
		}
	}
	return true
}
